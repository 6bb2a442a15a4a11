"""Coverage-guided fuzzing of everything that the library reads: ten minutes by default.

    pip install 'atheris==3.0.0'
    python tests/fuzz.py --seconds 600 --results data/results/fuzz.json

libFuzzer changes the files of ``test_hostile.py``, keeps what reaches code that nothing reached before, and changes that again.
An error that is not the library's own, a hang of ten seconds or 200 MB of memory more than at the start end the run, and the
input is kept below ``--work``. Linux only; not part of ``make test``, which draws its damaged files at random.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS_FOR_ONE, MEGABYTES_MORE = 10, 200


def fuzz(work: Path, seconds: int) -> None:
    """In a process of its own, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["agd_lib"]):
        import test_hostile as hostile
        from small_models import write_dit_folder

        from agd_lib.base_models import load_base

    base = load_base(write_dit_folder(work / "base"))
    originals = hostile.write_originals(base, work / "originals")
    names, corpus, scratch = sorted(hostile.READERS), work / "corpus", work / "scratch"
    corpus.mkdir()
    scratch.mkdir()
    for number, name in enumerate(names):
        (corpus / f"{number}").write_bytes(bytes([number]) + (originals / name).read_bytes())

    def read(data: bytes) -> None:
        if data:
            name, content = names[data[0] % len(names)], data[1:]
            # as if by somebody who knows how: otherwise many files would end at their checksums
            hostile.read_changed(originals, scratch, base, name, lambda old: content, repaired=True)

    for number in range(len(names)):  # once each, for the memory that belongs to reading at all
        read((corpus / f"{number}").read_bytes())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    limits = [f"-max_total_time={seconds}", f"-timeout={SECONDS_FOR_ONE}", f"-rss_limit_mb={used + MEGABYTES_MORE}"]
    atheris.Setup(
        [sys.argv[0], *limits, "-max_len=100000", "-print_final_stats=1", f"-artifact_prefix={work}/", str(corpus)],
        read,
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--results", type=Path, default=None, help="where to write what came out")
    parser.add_argument("--work", type=Path, default=None, help="an empty folder; by default a temporary one")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inner:
        fuzz(arguments.work, arguments.seconds)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="fuzz-"))
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--inner", "--work", str(work), "--seconds", str(arguments.seconds)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    runs = re.search(r"Done (\d+) runs in (\d+) second", run.stderr)
    covered = re.findall(r"cov: (\d+) ft: (\d+)", run.stderr)
    if run.returncode or not runs:
        print(run.stderr[-6_000:], file=sys.stderr)
        sys.exit(
            f"something else than the library's own errors came out, or the fuzzer did not run; its input is in {work}"
        )
    from agd_lib.storage import write_json
    from agd_lib.study import provenance

    result = provenance("python tests/fuzz.py " + shlex.join(sys.argv[1:]), float(runs[2])) | {
        "inputs": int(runs[1]),
        "code_edges_at_the_start": int(covered[0][0]),
        "code_edges_at_the_end": int(covered[-1][0]),
        "other_errors": 0,
    }
    print(json.dumps(result, indent=1))
    if arguments.results:
        write_json(arguments.results, result)


if __name__ == "__main__":
    main()
