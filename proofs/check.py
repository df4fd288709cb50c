"""Compile the Coq proofs and show that they assume nothing.

Four things can go wrong with a machine-checked proof, and each has its own gate:

1. the source leaves a gap (``Admitted``, ``Axiom``, ``Hypothesis`` outside a section): a scan of the source;
2. a proof is wrong: ``coqc``;
3. a proof leans on something outside the listed files, an axiom of the standard library say: ``Print Assumptions``
   on every theorem and lemma, then ``coqchk``, which reads the compiled files with an independent kernel;
4. a statement quietly disappears: ``statements.json`` and the sources must name the same theorems, each statement
   must have its heading in its Markdown file, and the table in ``README.md`` must be the one of ``statements.json``.

Only the standard library of Python is used. Everything written lands in ``coq/build``.
Exit codes: 0 all proven, 1 something is not, 2 Coq or MathComp is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "coq"
BUILD = SOURCES / "build"
STATEMENTS = HERE / "statements.json"
README = HERE / "README.md"
TABLE_BEGINS, TABLE_ENDS = "<!-- table begins -->\n", "<!-- table ends -->"
PACKAGES = "coq libcoq-mathcomp-ssreflect libcoq-mathcomp-algebra libcoq-mathcomp-algebra-tactics"

# Vernacular that leaves a gap, or that switches a check of the kernel off.
FORBIDDEN = re.compile(
    r"\b(Admitted|admit|give_up|Abort|Axioms?|Parameters?|Conjectures?|Admit\s+Obligations|"
    r"Guard\s+Checking|Positivity\s+Checking|Universe\s+Checking|bypass_check|Primitive|Declare\s+ML)\b"
)
# These are assumptions only outside a section; inside they become hypotheses of the closed statement.
SECTION_LOCAL = re.compile(r"^\s*(Variables?|Hypothes[ie]s|Context)\b")
STATEMENT = re.compile(
    r"^\s*(?:Local\s+|Global\s+|#\[[^\]]*\]\s*)*(Theorem|Lemma|Corollary|Proposition|Fact|Remark)\s+(\w+)", re.M
)


class Failure(Exception):
    """A gate that did not hold; the text is for the reader."""


def strip_comments(text: str) -> str:
    """Blank out (nested) comments and keep the line structure."""
    kept, depth, position = [], 0, 0
    while position < len(text):
        if text.startswith("(*", position):
            depth, position = depth + 1, position + 2
        elif depth and text.startswith("*)", position):
            depth, position = depth - 1, position + 2
        else:
            character = text[position]
            kept.append(character if not depth or character == "\n" else " ")
            position += 1
    return "".join(kept)


def ordered_files(directory: Path) -> list[Path]:
    """The files of _CoqProject in their order; a file that is not listed would go unchecked, so it is an error."""
    listed = [line.strip() for line in (directory / "_CoqProject").read_text().splitlines()]
    names = [line for line in listed if line.endswith(".v")]
    present = {path.name for path in directory.glob("*.v")}
    if set(names) != present:
        raise Failure(f"_CoqProject and the directory disagree about: {sorted(set(names) ^ present)}")
    return [directory / name for name in names]


def scan(files: list[Path]) -> None:
    """Gate 1."""
    for path in files:
        depth = 0
        for number, line in enumerate(strip_comments(path.read_text()).splitlines(), start=1):
            if found := FORBIDDEN.search(line):
                raise Failure(f"{path.name}:{number}: '{found.group(0)}' leaves a gap")
            if re.match(r"\s*Section\b", line):
                depth += 1
            elif re.match(r"\s*End\b", line):
                depth -= 1
            elif SECTION_LOCAL.match(line) and depth == 0:
                raise Failure(f"{path.name}:{number}: an assumption outside every section")


def run(command: list[str], directory: Path) -> str:
    """Run a tool; its output, or a Failure that shows it."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command[:1] + command[-1:])} failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def compile_all(files: list[Path], build: Path, flags: list[str]) -> None:
    """Gate 2. A compiled file older than its source, or than anything compiled before it, is compiled again."""
    stale = False
    for path in files:
        source, compiled = build / path.name, (build / path.name).with_suffix(".vo")
        text = path.read_text()
        stale = stale or not compiled.exists() or not source.exists() or source.read_text() != text
        if stale:
            source.write_text(text)
            started = time.monotonic()
            run(["coqc", *flags, path.name], build)
            print(f"  {path.name:<18} {time.monotonic() - started:5.1f} s", flush=True)


def names_by_file(files: list[Path]) -> dict[str, list[tuple[str, str]]]:
    """For each file its (kind, name) pairs."""
    return {path.name: STATEMENT.findall(strip_comments(path.read_text())) for path in files}


def print_assumptions(files: list[Path], build: Path, flags: list[str]) -> int:
    """Gate 3, first half: every theorem and lemma is closed under the global context."""
    qualified = [
        f"{Path(name).stem}.{statement}" for name, found in names_by_file(files).items() for _, statement in found
    ]
    lines = [f"From SubspaceMeta Require {' '.join(path.stem for path in files)}."]
    # One term that mentions every statement: its assumptions are those of all, found in a single walk.
    lines += ["Definition everything : True :="]
    lines += [f"  let _ := @SubspaceMeta.{name} in" for name in qualified]
    lines += ["  I.", "Print Assumptions everything."]
    (build / "assumptions_check.v").write_text("\n".join(lines) + "\n")
    output = run(["coqc", *flags, "assumptions_check.v"], build)
    if output.strip() != "Closed under the global context":
        raise Failure(f"the statements assume something:\n{output[-4000:]}")
    return len(qualified)


def independent_check(files: list[Path], build: Path) -> None:
    """Gate 3, second half: the compiled files once more, by the stand-alone checker.

    Its list of axioms also names every constant that the libraries seal behind a module type (``BigOp.bigop`` and
    the like have a definition, but not a visible one), so only a name of ours counts; ``Print Assumptions`` above,
    which looks through the seals, is what shows that the libraries bring in nothing.
    """
    modules = [f"SubspaceMeta.{path.stem}" for path in files]
    norec = [argument for module in modules for argument in ("-norec", module)]
    output = run(["coqchk", "-silent", "-o", "-R", ".", "SubspaceMeta", *norec], build)
    summary = output.partition("CONTEXT SUMMARY")[2]
    ours = [line.strip() for line in summary.splitlines() if line.strip().startswith("SubspaceMeta.")]
    if not summary or ours:
        raise Failure(f"coqchk lists assumptions of ours: {ours or output}")


def compare_with_statements(files: list[Path], statements: Path) -> int:
    """Gate 4. Every theorem named in the table exists, and every theorem of the sources is in the table."""
    found = {f"{name}:{statement}": kind for name, pairs in names_by_file(files).items() for kind, statement in pairs}
    table = json.loads(statements.read_text())["statements"]
    listed = {theorem for statement in table for theorem in statement["coq"]}
    if missing := sorted(listed - set(found)):
        raise Failure(f"in statements.json but not in the sources: {missing}")
    if unlisted := sorted(name for name, kind in found.items() if kind == "Theorem" and name not in listed):
        raise Failure(f"theorems that statements.json does not mention: {unlisted}")
    for statement in table:
        heading = f"## {statement['id']}\n"
        if "markdown" in statement and heading not in (HERE / statement["markdown"]).read_text():
            raise Failure(f"{statement['markdown']} has no heading for {statement['id']}")
    return len(listed)


def table_of(statements: Path) -> str:
    """The rows of README.md."""
    rows = [
        "| statement | plain proof | checked | Coq theorem | code it is about | hypothesis test |",
        "|---|---|---|---|---|---|",
    ]
    for statement in json.loads(statements.read_text())["statements"]:
        name, path = statement["id"], statement["markdown"]
        by_file: dict[str, list[str]] = {}
        for theorem in statement["coq"]:
            by_file.setdefault(theorem.partition(":")[0], []).append(f"`{theorem.partition(':')[2]}`")
        coq = "; ".join(f"[`{file}`](coq/{file}): {', '.join(names)}" for file, names in by_file.items())
        code = ", ".join(f"`{code}`" for code in statement["code"])
        test = f"`{statement['test'].partition('::')[2]}`" + ("" if statement["test_exists"] else " (not yet)")
        rows.append(
            f"| {statement['title']} | [{name}]({path}#{name}) | {statement['checked']} | {coq or 'none'} "
            f"| {code or 'not yet'} | {test} |"
        )
    return "\n".join(rows) + "\n"


def readme_parts() -> tuple[str, str, str]:
    """README.md before, inside and after its table."""
    before, _, rest = README.read_text().partition(TABLE_BEGINS)
    table, _, after = rest.partition(TABLE_ENDS)
    return before + TABLE_BEGINS, table, TABLE_ENDS + after


def check(directory: Path, build: Path, statements: Path, with_coqchk: bool = True) -> str:
    """All gates; one line of result."""
    build.mkdir(parents=True, exist_ok=True)
    flags = ["-q", "-w", "none", "-R", ".", "SubspaceMeta"]
    files = ordered_files(directory)
    scan(files)
    compile_all(files, build, flags)
    total = print_assumptions(files, build, flags)
    listed = compare_with_statements(files, statements)
    if readme_parts()[1] != table_of(statements):
        raise Failure("the table in README.md is not that of statements.json: run check.py --table")
    if with_coqchk:
        independent_check(files, build)
    return f"{total} statements proven, nothing assumed; {listed} of them in statements.json"


PLANTED = {
    "a false lemma": ("Lemma planted : 2 + 2 = 5.\nProof. reflexivity. Qed.\n", "failed"),
    "an admitted lemma": ("Lemma planted : 2 + 2 = 5.\nAdmitted.\n", "Admitted"),
    "a proof given up": ("Lemma planted : 2 + 2 = 5.\nProof. give_up. Admitted.\n", "give_up"),
    "an axiom": ("Axiom planted : False.\n", "Axiom"),
    "a parameter": ("Parameter planted : False.\n", "Parameter"),
    "a hypothesis outside a section": ("Hypothesis planted : False.\n", "outside every section"),
    "an axiom of the standard library": (
        "From Coq Require Import Classical.\nLemma planted (P : Prop) : P \\/ ~ P.\nProof. exact (classic P). Qed.\n",
        "assume something",
    ),
    "a theorem the table does not know": (
        "Theorem planted : 2 + 2 = 4.\nProof. reflexivity. Qed.\n",
        "does not mention",
    ),
}


def selftest() -> list[str]:
    """Plant each mistake in a copy; the names of those that went unnoticed."""
    check(SOURCES, BUILD, STATEMENTS, with_coqchk=False)
    unnoticed = []
    for name, (text, expected) in PLANTED.items():
        copy = BUILD / "selftest"
        shutil.rmtree(copy, ignore_errors=True)
        (copy / "build").mkdir(parents=True)
        for path in ordered_files(SOURCES):
            shutil.copy(path, copy)
            # The honest files were compiled above; only what is planted is compiled again.
            for suffix in (".v", ".vo"):
                shutil.copy2((BUILD / path.name).with_suffix(suffix), copy / "build")
        (copy / "planted.v").write_text(text)
        (copy / "_CoqProject").write_text((SOURCES / "_CoqProject").read_text() + "planted.v\n")
        try:
            check(copy, copy / "build", STATEMENTS, with_coqchk=False)
            seen = "NOT SEEN"
        except Failure as failure:
            seen = "seen" if expected in str(failure) else f"failed for another reason: {failure}"
        print(f"  {name:<36} {seen}", flush=True)
        if seen != "seen":
            unnoticed.append(name)
        shutil.rmtree(copy)
    lost = dict(json.loads(STATEMENTS.read_text()))
    lost["statements"] = [*lost["statements"], {"coq": ["stiefel.v:planted_and_lost"]}]
    table = BUILD / "statements_planted.json"
    table.write_text(json.dumps(lost))
    try:
        compare_with_statements(ordered_files(SOURCES), table)
        unnoticed.append("a lost theorem")
    except Failure:
        print(f"  {'a lost theorem':<36} seen", flush=True)
    table.unlink()
    return unnoticed


def coq_is_here() -> bool:
    """coqc, coqchk and the three MathComp libraries can be found."""
    if not (shutil.which("coqc") and shutil.which("coqchk")):
        return False
    BUILD.mkdir(parents=True, exist_ok=True)
    probe = BUILD / "probe.v"
    probe.write_text("From mathcomp Require Import all_ssreflect all_algebra.\nFrom mathcomp Require Import ring.\n")
    return subprocess.run(["coqc", "-q", "-w", "none", probe.name], cwd=BUILD, capture_output=True).returncode == 0


def main() -> int:
    """Check everything, or do what the options say; return the exit code."""
    parser = argparse.ArgumentParser(description="Compile the Coq proofs and show that they assume nothing.")
    parser.add_argument("--selftest", action="store_true", help="plant mistakes in a copy and show that each is seen")
    parser.add_argument(
        "--table", action="store_true", help="write the table of statements.json into README.md; needs no Coq"
    )
    arguments = parser.parse_args()
    if arguments.table:
        before, _, after = readme_parts()
        README.write_text(before + table_of(STATEMENTS) + after)
        return 0
    if not coq_is_here():
        print(f"Coq with MathComp is missing; on Debian: apt-get install {PACKAGES}", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        if arguments.selftest:
            unnoticed = selftest()
            if unnoticed:
                print(f"not noticed: {unnoticed}", file=sys.stderr)
                return 1
            print(f"every planted mistake was seen ({time.monotonic() - started:.0f} s)")
        else:
            print(f"{check(SOURCES, BUILD, STATEMENTS)} ({time.monotonic() - started:.0f} s)")
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
