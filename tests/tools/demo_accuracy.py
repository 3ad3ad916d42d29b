"""Count how many held-out pairs a trained demo model answers with exactly the expected SQL.

    python tests/tools/demo_accuracy.py RUN_DIR [N]

RUN_DIR is the folder that a run of configs/demo_cpu.yaml wrote (the one that holds
model.safetensors). The first N held-out pairs (100 by default) are prompted through the chat
template that was saved with the model, thinking off as in training, and decoded greedily.
"""

import argparse
import json
from pathlib import Path

HELD_OUT = (
    Path(__file__).resolve().parent.parent.parent / "configs" / "data" / "code2sql_heldout.json"
)
BATCH = 50
LONGEST_ANSWER = 80


def held_out_pairs(limit):
    return json.loads(HELD_OUT.read_text(encoding="utf-8"))[:limit]


def as_prompt(tokenizer, pair):
    message = {"role": "user", "content": pair["instruction"] + "\n" + pair["input"]}
    return tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def answers(run_dir, pairs):
    """The model's SQL for each pair."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(run_dir, dtype=torch.float32).eval()
    found = []
    for start in range(0, len(pairs), BATCH):
        prompts = [as_prompt(tokenizer, pair) for pair in pairs[start : start + BATCH]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        new = output[:, batch["input_ids"].shape[1] :]
        found += [
            text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)
        ]
    return found


def exact_matches(run_dir, limit=100):
    """(right, total) over the first `limit` held-out pairs."""
    pairs = held_out_pairs(limit)
    right = sum(
        answer == pair["output"]
        for answer, pair in zip(answers(run_dir, pairs), pairs, strict=True)
    )
    return right, len(pairs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("limit", metavar="N", type=int, nargs="?", default=100)
    options = parser.parse_args()
    if not (options.run_dir / "model.safetensors").is_file():
        parser.error(
            f"{options.run_dir}/model.safetensors does not exist; "
            "expected the directory of a finished run"
        )
    right, total = exact_matches(options.run_dir, options.limit)
    print(f"exact: {right} of {total}")


if __name__ == "__main__":
    main()
