"""What pages and docstrings name is there: files, links, sections, fields and messages."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "recipes/README.md", "benchmarks/README.md")]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *READMES]
TOP = {path.name for path in ROOT.iterdir() if path.is_dir()}
IGNORED = (ROOT / ".gitignore").read_text().split()
FOLDERS = ("sparse_unsloth", "kernels", "recipes", "benchmarks", "tests")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__).resolve()]

FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
PATH = re.compile(r"\.?\w[\w.-]*(/[\w.-]+)*/?")
DOTTED = re.compile(rf"({'|'.join(FOLDERS)})(\.\w+)+")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
CITATION = re.compile(
    r"docs/([\w-]+\.md)(?:,[\s#]+sections?[\s#]+([\d.]+\d|\d)(?:[\s#]+(?:and|to)[\s#]+([\d.]+\d|\d))?)?"
)


def is_path(word: str) -> bool:
    """Whether ``word`` means a file or folder of the repository; names in capitals stand for the reader's own."""
    if not PATH.fullmatch(word) or "/" not in word or "NAME" in word or word.startswith(tuple(IGNORED)):
        return False
    return word.endswith("/") or word.split("/")[0] in TOP or bool(re.fullmatch(r"\.[a-z]\w*", Path(word).suffix))


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that a module or class defines or imports, under ``TYPE_CHECKING`` too."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.If):
            found |= defined(node.body)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
    return found


def exists(dotted: str) -> bool:
    """Whether a package, module, or name in one is there, as its source tells."""
    place, names = ROOT, dotted.split(".")
    while names and (place / names[0]).is_dir():
        place /= names.pop(0)
    if names and (place / f"{names[0]}.py").is_file():
        place /= f"{names.pop(0)}.py"
    elif names:
        place /= "__init__.py"
    for name in names:
        body = ast.parse(place.read_text(encoding="utf-8")).body if isinstance(place, Path) and place.is_file() else []
        place = defined(body if isinstance(place, Path) else getattr(place, "body", [])).get(name)
        if place is None:
            return False
    return True


def anchors(text: str) -> set[str]:
    """Those that are written, and those that GitHub makes of headings."""
    found = set(ANCHOR.findall(text))
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"<[^>]*>", "", title).strip().lower()).replace(" ", "-")
        found.add(slug)
    return found


def problems(page: Path) -> list[str]:
    """Everything that ``page`` names and that is not there."""
    text = page.read_text(encoding="utf-8")
    plain = FENCE.sub("", text)
    words = [*SPAN.findall(plain), *(word for block in FENCE.findall(text) for word in block.split())]
    found = [
        word for word in words if is_path(word) and not any((base / word).exists() for base in (ROOT, page.parent))
    ]
    found += [word for word in words if DOTTED.fullmatch(word) and not exists(word)]
    for link in LINK.findall(SPAN.sub("", plain)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def wrong_citations(source: str) -> list[str]:
    """Pages and sections that a source cites and that are not there."""
    found = []
    for page, *numbers in CITATION.findall(source):
        path = ROOT / "docs" / page
        known = anchors(path.read_text(encoding="utf-8")) if path.is_file() else None
        if known is None:
            found.append(page)
            continue
        found += [f"{page}, {number}" for number in numbers if number and f"s{number.replace('.', '-')}" not in known]
    return found + re.findall(r"\bDESIGN(?:\.md)?\b|\bdesign,? section \d", source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    assert problems(page) == []


def test_what_docstrings_cite_is_there():
    found = {str(path.relative_to(ROOT)): wrong_citations(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def test_sections_are_numbered_and_have_their_anchors():
    text = FENCE.sub("", (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8"))
    last = [0]
    for marks, title in re.findall(r"^##(#?) (.*)$", text, re.MULTILINE):
        anchor, number = re.match(r'<a id="s([\d-]+)"></a>(\d+\.\d+|\d+)\.? ', title).groups()
        assert anchor == number.replace(".", "-")
        expected = [last[0], (*last, 0)[1] + 1] if marks else [last[0] + 1]
        assert [int(part) for part in number.split(".")] == expected
        last = expected


def test_the_glossary_has_each_term_once():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").partition("Glossary\n")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 30
    assert {len(row) for row in rows} == {3}
    terms = [term for row in rows for term in row[0].split(", ")]
    assert len(set(terms)) == len(terms)
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=str.lower)


def test_the_tree_has_each_package_once():
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \d+ \| `(\w+)` \|", text, re.MULTILINE)
    places = [path for path in (ROOT / "sparse_unsloth").iterdir() if path.is_dir() or path.suffix == ".py"]
    assert sorted(listed) == sorted({path.stem for path in places} - {"recipes", "__pycache__"})


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_site_and_linked_from_the_readme():
    text = re.sub(r"!!python\S* ", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"^\s+- (?:[\w ]+: )?([\w/-]+\.md)$", text, re.MULTILINE)
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    assert sorted(listed) == sorted(pages)
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {page for page in pages if page.startswith("docs/")} <= {link.partition("#")[0] for link in links}


def test_the_configuration_page_has_the_fields_of_the_code():
    """`python docs/write_configuration.py` (also a part of `make docs`) writes them."""
    spec = importlib.util.spec_from_file_location("write_configuration", ROOT / "docs" / "write_configuration.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    text = writer.PAGE.read_text(encoding="utf-8")
    assert writer.written(text) == text
    assert writer.written(text.replace("| `backward_rows` |", "| `backward_row` |")) == text


def messages(source: str) -> str:
    """Every string of a source, with its pieces joined, on one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def unknown_messages(page: str, known: str) -> list[str]:
    """The first cells of a page's tables of messages that no source says."""
    cells = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert cells
    return [cell for cell in cells if cell not in known]


def test_messages_of_troubleshooting_are_those_of_the_code():
    known = "\n".join(messages(path.read_text(encoding="utf-8")) for path in (ROOT / "sparse_unsloth").rglob("*.py"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert unknown_messages(page, known) == []
    assert unknown_messages(page.replace("`is an encoder-decoder", "`is an encoded"), known) == ["is an encoded model"]


def test_the_picture_of_the_readme_shows_its_table():
    """`python benchmarks/plot_readme.py` draws it."""
    pytest.importorskip("matplotlib", reason="pip install -e '.[study]'")
    from PIL import Image

    spec = importlib.util.spec_from_file_location("plot_readme", ROOT / "benchmarks" / "plot_readme.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    table = plot.table_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert Image.open(plot.PICTURE).text[plot.KEPT_AS] == "\n".join(table)
    tokens = {
        batch: speeds[0] * float(cells)
        for (batch, speeds), cells in zip(
            plot.figures(table).items(), (line.split("|")[2] for line in table[2:]), strict=True
        )
    }
    assert [round(count) for count in tokens.values()] == [1666, 2048, 8192, 8192]


def test_hooks_before_a_commit_are_what_make_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    entries = [hook["entry"] for hook in hooks]
    assert [entry for entry in entries if "pytest" not in entry] == re.search(
        r"^lint:.*\n((\t.*\n)+)", makefile, re.MULTILINE
    )[1].replace("\t", "").splitlines()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'src="http' not in page
    links = re.findall(r'(?:href|src)="([^":#]+)["#]', page)
    assert any(link.endswith(".css") for link in links)
    assert [link for link in links if not (tmp_path / link.partition("?")[0]).exists()] == []


def test_a_wrong_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        """# A page
## <a id="s1-2"></a>1.2 Here, and there
`sparse_unsloth/errors.py`, `sparse_unsloth.errors.ConfigError`, `sparse_unsloth.attach`, `kernels/`,
`sparse_unsloth.kernels.select`, `recipes/NAME.yaml`, `lora_alpha / r`, `runs/`, `a/b`, [here](#s1-2),
[as GitHub has it](#12-here-and-there), [a page](page.md#s1-2), [elsewhere](https://example.com/#none).
`sparse_unsloth/error.py`, `sparse_unsloth.error`, `sparse_unsloth.errors.NoError`, `sparse_unsloth.nothing`,
`kernel/`, [nowhere](#s9), [no page](pages.md), [no section](page.md#s9), `scripts/run.py`.

```bash
pytest tests/test_docs.py tests/test_pages.py
```
""",
        encoding="utf-8",
    )
    assert problems(page) == [
        "sparse_unsloth/error.py", "kernel/", "scripts/run.py", "tests/test_pages.py", "sparse_unsloth.error",
        "sparse_unsloth.errors.NoError", "sparse_unsloth.nothing", "#s9", "pages.md", "page.md#s9",
    ]  # fmt: skip
    cited = (
        "docs/how-it-works.md, section 3.2; docs/how-it-works.md,\n# sections 3 and 99.1; docs/no-page.md, section 1"
    )
    assert wrong_citations(cited) == ["how-it-works.md, 99.1", "no-page.md"]
    assert wrong_citations("(DESIGN.md section 2), (design section 5)") == ["DESIGN.md", "design section 5"]
