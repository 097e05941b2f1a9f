"""Start-up: `import opsin` and `opsin --help` must answer in under 0.3 s. Prints the median of 15 runs of each.

python benchmarks/startup.py
"""

import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import opsin": [sys.executable, "-c", "import opsin"],
    "opsin --help": [sys.executable, "-m", "opsin", "--help"],
    "opsin models": [sys.executable, "-m", "opsin", "models"],
}

if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(15):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        print(f"{name:16} {statistics.median(seconds):.3f} s")
