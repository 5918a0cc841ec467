"""Print what the last run of the pipeline made, and how good it is.

python -m tools.summary
"""

import json
from pathlib import Path
from typing import Any


def main() -> None:
    exam, gguf = read("evaluate"), read("gguf")
    gain = exam["gain"]
    print(f"\n{'exam':24}{'exact match':>12}{'F1':>8}{'agreement':>11}{'size':>10}")
    for name, scores in {"base": exam["base"], "tuned (NF4 + adapter)": exam["tuned"], **gguf}.items():
        agreement = f"{scores['agreement']:.3f}" if "agreement" in scores else ""
        size = f"{scores['bytes'] / 1e6:.1f} MB" if "bytes" in scores else ""
        print(f"{name:24}{scores['exact_match']:>12.3f}{scores['f1']:>8.3f}{agreement:>11}{size:>10}")
    print(
        f"\ngain {gain['exact_match']:+.3f} (95 % interval {gain['low']:+.3f} to {gain['high']:+.3f}, "
        f"p = {gain['p_value']:.1g}): {exam['flips']['fixed']} answers fixed, {exam['flips']['broken']} broken\n"
        "agreement: of merged with tuned, of each GGUF file with merged\n"
        "adapter    outputs/adapter\n"
        "Modelfile  models/gguf/Modelfile"
    )


def read(name: str) -> Any:
    return json.loads(Path(f"metrics/{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
