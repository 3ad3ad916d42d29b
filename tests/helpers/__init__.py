"""What tests, benchmarks and tools share; importing it makes `import train_qwen3_ft` work."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "train_qwen3_ft.py"
HELPERS = ROOT / "tests" / "helpers"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
