"""The launcher with some of its rules switched off: python without_rules.py TEXT [ARGUMENT ...]

Without every rule whose text holds TEXT, so that a test sees what the run itself notices.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_qwen3_ft as ft  # noqa: E402

if __name__ == "__main__":
    text = sys.argv.pop(1)
    ft.RULES = [rule for rule in ft.RULES if text not in rule[-1]]
    sys.exit(ft.main())
