"""Malformed safetensors headers by the thousand: each must give an error of ours that names the folder.

    python tests/soak/headers.py --count 2000 --seconds 600

The damage is that of tests/test_pretrained.py. Prints JSON figures, and ends with 1 where something was wrong.
Memory is limited, and a crash of the process is its own sign.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audio import MEMORY, held
from test_pretrained import mutants, write_folder

from ser.errors import SerError
from ser.models.pretrained import load_encoder


def soak(count: int, seconds: float) -> dict:
    """The figures of ``count`` headers, or of as many as ``seconds`` allow."""
    began = time.monotonic()
    found = {"headers": 0, "refused": 0, "harmless": 0, "wrong": [], "slowest_seconds": 0.0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        write_folder(folder)
        path = folder / "model.safetensors"
        if held("VmSize"):
            resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + MEMORY,) * 2)
        for data in mutants(path.read_bytes(), count):
            if time.monotonic() - began > seconds:
                break
            path.write_bytes(data)
            start = time.perf_counter()
            try:
                load_encoder(folder)  # a flipped letter in the metadata does no harm
                found["harmless"] += 1
            except SerError as error:
                found["refused"] += 1
                if str(folder) not in str(error):
                    found["wrong"].append(
                        f"header {found['headers']}: the error does not name the folder: {error}"
                    )
            except Exception as error:
                found["wrong"].append(f"header {found['headers']}: {type(error).__name__}: {error}")
            found["slowest_seconds"] = max(found["slowest_seconds"], round(time.perf_counter() - start, 3))
            found["headers"] += 1
    return found | {"peak_mib": held("VmHWM") >> 20, "seconds": round(time.monotonic() - began)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="headers (default: 2000)")
    parser.add_argument("--seconds", type=float, default=600, help="stop after these many (default: 600)")
    arguments = parser.parse_args()
    figures = soak(arguments.count, arguments.seconds)
    print(json.dumps(figures))
    return 1 if figures["wrong"] or figures["slowest_seconds"] >= 1 else 0


if __name__ == "__main__":
    sys.exit(main())
