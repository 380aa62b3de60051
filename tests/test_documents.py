"""Every example of the README, CONTRIBUTING and the documentation pages is run.

A fenced block marked as Python is executed; `>>>` examples, fenced or not, are executed and their
output is compared. The examples of one document share their names, from top to bottom. A block
marked `python theirs` is code for another library, and is only compiled. The flag `+ABOUT` of an
example with figures that depend on the machine compares its numbers with a tolerance.
"""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NO_PROSE = {"changelog.md", "api.md", "support.md"}  # lists, and what links lead to
TAUGHT_BY_EXAMPLE = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS = TAUGHT_BY_EXAMPLE + sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")
)

FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^`]*)")
PYTHON = {"python", "py", "python3", "pycon"}
THEIRS = "theirs"
ABOUT = doctest.register_optionflag("ABOUT")
NUMBER = re.compile(r"\d+(?:\.\d*)?(?:e[+-]?\d+)?")


class Example(NamedTuple):
    source: str
    line: int  # of the first line of `source`, from 0
    compare: bool  # whether `source` has `>>>` and output to compare with
    ours: bool = True  # whether to run it


class Checker(doctest.OutputChecker):
    """With the flag `ABOUT` numbers may differ by 20 %, or by one in the last digit."""

    def check_output(self, want, got, optionflags):
        if not optionflags & ABOUT:
            return super().check_output(want, got, optionflags)
        texts = [NUMBER.sub("0", text).split() for text in (want, got)]
        return texts[0] == texts[1] and all(
            abs(float(one) - float(other)) <= 0.2 * float(one) + self.digit(one)
            for one, other in zip(NUMBER.findall(want), NUMBER.findall(got), strict=True)
        )

    @staticmethod
    def digit(number):
        return 10.0 ** -len(number.partition("e")[0].partition(".")[2])


def examples(text: str) -> Iterator[Example]:
    """The examples of a Markdown document, in order."""
    fence, info, start, block = None, "", 0, []

    def example() -> Iterator[Example]:
        if any(line.lstrip().startswith(">>>") for line in block):
            yield Example("\n".join(block) + "\n", start, compare=True)
        elif fence and PYTHON & set(info.split()):
            indent = min(len(line) - len(line.lstrip()) for line in block if line.strip())
            source = "\n".join(line[indent:] for line in block)
            yield Example(source, start, compare=False, ours=THEIRS not in info.split())

    for number, line in enumerate(text.splitlines()):
        mark = FENCE.fullmatch(line)
        opens = mark and fence is None
        closes = mark and fence and mark[1].startswith(fence) and not mark[2]
        if opens or closes:
            yield from example()
            fence, info = (mark[1], mark[2]) if opens else (None, "")
            start, block = number + 1, []
        else:
            block.append(line)
    assert fence is None, f"the fence before line {start + 1} is not closed"
    yield from example()


def run(found: list[Example], name: str) -> None:
    """Run the examples in one namespace; raise what they raise, fail if an output differs."""
    namespace = {"__name__": "__main__"}
    for example in found:
        if example.compare:
            test = doctest.DocTestParser().get_doctest(
                example.source, namespace, name, name, example.line
            )
            report = []
            runner = doctest.DocTestRunner(
                Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            if runner.run(test, out=report.append, clear_globs=False).failed:
                pytest.fail("".join(report), pytrace=False)
            namespace.update(test.globs)
        else:
            # the newlines make the line numbers of a traceback those of the document
            code = compile("\n" * example.line + example.source, name, "exec")
            if example.ours:
                exec(code, namespace)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples(name, tmp_path, monkeypatch):
    found = list(examples((ROOT / name).read_text(encoding="utf-8")))
    assert found or name not in TAUGHT_BY_EXAMPLE, f"{name} has no example"
    monkeypatch.chdir(tmp_path)  # what an example writes does not stay
    run(found, name)


DOCUMENT = """
Prose.

1. In a list:
   ```python
   x = 1
   if x:
       y = [1,
            2]
   ```

```console
$ this is not run
```

~~~pycon
>>> y
[1, 2]
~~~

    >>> x + 1  # not fenced
    2

```{code-block} python
assert x + 1 == 2
```

```python theirs
from another import library
```

>>> print(0.101, "50.0%")  # doctest: +ABOUT
0.11 55.0%
"""


def test_all_examples_are_found_and_share_names():
    found = list(examples(DOCUMENT))
    assert [example.compare for example in found] == [False, True, True, False, False, True]
    assert [DOCUMENT.splitlines()[e.line].strip() for e in found[:2]] == ["x = 1", ">>> y"]
    run(found, "document")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("```python\n>>> 1 + 1\n3\n```\n", pytest.fail.Exception),
        (">>> 1 / 0\n1\n", pytest.fail.Exception),
        (">>> print(0.2)  # doctest: +ABOUT\n0.11\n", pytest.fail.Exception),
        (">>> print(0.2, 1)  # doctest: +ABOUT\n0.2\n", pytest.fail.Exception),
        ("```python theirs\nx =\n```\n", SyntaxError),
        ("```python\nx = 1\n", AssertionError),  # never closed
    ],
)
def test_a_wrong_example_fails(bad, error):
    with pytest.raises(error):
        run(list(examples(bad)), "bad")


def test_every_prose_page_links_to_the_api(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    api_links = pytest.importorskip("api_links")
    for path in (ROOT / "docs").glob("*.md"):
        text = "".join(
            re.split(r"(?ms)^```(?:py|console).*?^```", path.read_text(encoding="utf-8"))
        )
        found = [code for code in re.findall(r"`([^`\n]+)`", text) if api_links.target(code)]
        assert found or path.name in NO_PROSE, f"{path.name} names no public object in its prose"


@pytest.mark.parametrize("name", [*TAUGHT_BY_EXAMPLE, "CHANGELOG.md"])
def test_links_to_files_of_the_repository_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
