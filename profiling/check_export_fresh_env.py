"""Does an exported directory run where there is only torch and transformers? One JSON object on standard output.

    lowmem export --run runs/demo --out demo-hf
    python profiling/check_export_fresh_env.py demo-hf --prompt "def read_file(path):"
    python profiling/check_export_fresh_env.py demo-hf --pip_args="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"

A virtual environment is made in a temporary folder (set TMPDIR to choose the disk; a CPU build of torch takes about 1 GB), torch and
transformers of the versions that are installed here go into it, and transformers' text-generation pipeline writes a few tokens there.
"""

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("torch", "transformers")
PIPELINE = """
import importlib.util, json, sys
directory, prompt, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
assert importlib.util.find_spec("lowmem") is None, "lowmem is installed here"
from transformers import pipeline
write = pipeline("text-generation", model=directory, trust_remote_code=trust)
first = write([prompt], max_new_tokens=8, do_sample=False)[0][0]["generated_text"]
print(json.dumps({"text": first, "model": type(write.model).__name__, "tokenizer": type(write.tokenizer).__name__}))
"""


def main() -> None:
    """Make the environment, run the pipeline in it, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what `lowmem export` has written")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--pip_args", default="", help="more arguments of pip install, such as an index")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        wanted = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *shlex.split(options.pip_args), *wanted]
        subprocess.run(install, check=True, stdout=sys.stderr)
        frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout.split()
        trust = str(any(options.directory.glob("*_lowmem.py")))
        command = [python, "-I", "-c", PIPELINE, str(options.directory.resolve()), options.prompt, trust]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if ran.returncode:
            sys.exit(f"the pipeline failed:\n{ran.stderr}")
    result = json.loads(ran.stdout.splitlines()[-1])
    print(json.dumps({"directory": str(options.directory), "trust_remote_code": trust == "True", **result, "packages": frozen}, indent=1))


if __name__ == "__main__":
    main()
