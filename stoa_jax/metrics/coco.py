"""The Java parts of `pycocoevalcap`, its PTB tokeniser and METEOR, run from its jars."""

import importlib.util
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from stoa_jax.errors import UserError

NEEDS_JAVA = "needs Java"


def package() -> pathlib.Path | None:
    """Return the directory of `pycocoevalcap`; None if it or Java is not installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations or shutil.which("java") is None:
        return None
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _required() -> pathlib.Path:
    where = package()
    if where is None:
        raise UserError(
            "metrics: the Java tokeniser and METEOR need a Java run-time and pycocoevalcap; "
            "install Java and `pip install 'stoa-jax[metrics]'`"
        )
    return where


def java_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Split captions into lower-case tokens by the Stanford tokeniser that pycocoevalcap ships."""
    # The tokeniser reads one caption a line, so a caption must not contain a line end.
    lines = [" ".join(caption.splitlines()).replace("\x85", " ") for caption in captions]
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "captions.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp"]
        command += [str(_required() / "tokenizer" / "stanford-corenlp-3.4.1.jar")]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        done = subprocess.run([*command, str(file)], capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"metrics: the PTB tokeniser failed: {_last_line(done.stderr)}")
    out = done.stdout.decode("utf-8").split("\n")[: len(lines)]
    out += [""] * (len(lines) - len(out))
    return [[token for token in line.strip("\r ").split(" ") if token] for line in out]


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute METEOR 1.5 of tokenised captions by the jar that pycocoevalcap ships."""
    jar = _required() / "meteor" / "meteor-1.5.jar"
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", jar.name]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        to_java, from_java = process.stdin, process.stdout
        assert to_java is not None and from_java is not None

        def ask(line: str) -> str:
            to_java.write(f"{line}\n".encode())
            to_java.flush()
            answer = from_java.readline()
            if not answer:
                errors.seek(0)
                raise UserError(f"metrics: METEOR stopped: {_last_line(errors.read())}")
            return answer.decode().strip()

        try:
            statistics = []
            for hypothesis, wanted in zip(hypotheses, references, strict=True):
                text = hypothesis.replace("|||", "").replace("  ", " ")
                statistics.append(ask(f"SCORE ||| {' ||| '.join(wanted)} ||| {text}"))
            ask(f"EVAL ||| {' ||| '.join(statistics)}")  # the first caption's own score
            for _ in statistics[1:]:
                from_java.readline()
            return float(from_java.readline())
        finally:
            process.kill()


def _last_line(errors: bytes) -> str:
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no message"
