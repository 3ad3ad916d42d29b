"""Each change of a checkpoint by itself, at the same size: what a resume then says.

    python tests/tools/tamper.py    # about 15 minutes on two cores

For ZeRO-3 and ZeRO-2 on two ranks, and without DeepSpeed on one. Exit code 0: each resume was
refused before a step, and the line names what was changed.
"""

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers.config import write_config
from helpers.launcher import run, train
from test_proofs import CHANGES, EIGHT_STEPS, KINDS, is_refused, tampered


def main() -> int:
    print(__doc__.splitlines()[0])
    missed = 0
    for kind, changes in KINDS.items():
        ranks, names = (2, list(CHANGES)) if "ZeRO" in kind else (1, list(CHANGES)[2:])
        folder = Path(tempfile.mkdtemp(prefix="tamper-"))
        split = {"gradient_accumulation_steps": None, "global_batch_size": 2}
        saved = train(
            folder, write_config(folder, **EIGHT_STEPS, **split, **changes), ranks=ranks
        )
        for number, name in enumerate(names):
            code, pattern = CHANGES[name]
            copy = tampered(saved, f"changed-{number}", code)
            cause = is_refused(run(folder, "--resume", copy, "max_steps=12", ranks=ranks))
            found = re.search(pattern, cause)
            missed += not found
            print(f"{kind}: {name}: {found[0] if found else cause}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
