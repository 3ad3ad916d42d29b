"""What the figures of the data cost: tokenizing with them against tokenizing without.

python tests/benchmarks/data_line.py [ROWS]    # 1,000,000 by default, about 20 minutes

ROWS short pairs of the demo data are tokenized by LLaMA-Factory in one process, once with the
launcher's measures and once without, in processes of their own. Processor time is compared, so that
other work on the machine does not matter. At most 2 % is allowed.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import describe_machine, read_repeats
from helpers.config import CONFIGS


def write_rows(folder: Path, count: int) -> None:
    """`count` pairs of the demo data, no two alike."""
    pairs, draw = (
        json.loads((CONFIGS / "data" / "code2sql_demo.json").read_text()),
        random.Random(1),
    )
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            pair = draw.choice(pairs)
            file.write(json.dumps(pair | {"input": f"{pair['input']} # {number}"}) + "\n")
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl"}}')


def tokenize(folder: Path, is_measured: bool) -> None:
    """In a process of its own: print the processor seconds of the tokenization."""
    from llamafactory.data import get_template_and_fix_tokenizer, loader
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from train_qwen3_ft import Values, data_lines, measure_data

    values = Values(
        stage="sft",
        do_train=True,
        use_cpu=True,
        model_name_or_path=str(CONFIGS / "demo_model"),
        template="qwen3",
        enable_thinking=False,
        dataset="rows",
        dataset_dir=str(folder),
        cutoff_len=192,
        output_dir=str(folder / "out"),
        report_to="none",
    )
    if is_measured:
        measure_data(values, lambda figures, *rest: print(data_lines(figures, None)["data"]))
    model_args, data_args, args, method, _ = get_train_args(dict(values))
    tools = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tools["tokenizer"], data_args)
    rows = loader._get_merged_dataset(
        data_args.dataset, model_args, data_args, args, method.stage
    )
    begun = time.process_time()
    more = (template, tools["tokenizer"], tools["processor"])
    loader._get_preprocessed_dataset(rows, data_args, args, method.stage, *more, is_eval=False)
    print("SECONDS", time.process_time() - begun)


def seconds(folder: Path, mode: str) -> float:
    """Processor seconds of a tokenization, `plain` or `measured`."""
    env = {**os.environ, "HF_HOME": str(folder / mode), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, mode, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if "padding" in line and "rows" in line:
            print(line)
    return float(done.stdout.rpartition("SECONDS")[2])


def main() -> int:
    if sys.argv[1:2] in (["plain"], ["measured"]):
        tokenize(Path(sys.argv[2]), sys.argv[1] == "measured")
        return 0
    count = read_repeats(__doc__, 1_000_000)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name), count)
        plain, with_figures = (seconds(Path(name), mode) for mode in ("plain", "measured"))
    cost = with_figures / plain - 1
    print(f"{count:,} rows: {plain:.1f} s without, {with_figures:.1f} s with: {cost:.2%}")
    return 0 if cost <= 0.02 else 1


if __name__ == "__main__":
    raise SystemExit(main())
