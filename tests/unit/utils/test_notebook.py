"""HTML of results in notebooks: text is escaped, figures are embedded."""

from __future__ import annotations

import base64
import html.parser
from pathlib import Path

from convlens.utils import notebook
from helpers.commands import picture


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_text_is_escaped() -> None:
    odd = "<script>\"a\" & 'b'</script>"
    parsed = Parsed(notebook.paragraph(odd) + notebook.table([odd, "n"], [[odd, "1"]]))
    assert "".join(parsed.text) == odd + odd + "n" + odd + "1"
    assert {tag for tag, _ in parsed.tags} == {"p", "table", "thead", "tbody", "tr", "th", "td"}


def test_a_link_leads_to_the_file() -> None:
    ((_, _), (tag, attributes)) = Parsed(notebook.link(Path("plots/a b/#1.html"))).tags
    assert (tag, attributes["href"]) == ("a", "plots/a%20b/%231.html")
    absolute = Path("x.html").resolve()
    assert Parsed(notebook.link(absolute)).tags[1][1]["href"] == absolute.as_uri()


def test_figures_are_embedded_and_others_are_named() -> None:
    paths = [picture(Path(f"{n}.png"), (200,)) for n in range(notebook.MAX_FIGURES + 2)]
    Path("a.npz").write_bytes(b"x")
    parsed = Parsed(notebook.embed_figures([Path("lost.png"), Path("a.npz"), *paths]))
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert [each["alt"] for each in images] == [str(n) for n in range(notebook.MAX_FIGURES)]
    kind, _, content = str(images[0]["src"]).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == paths[0].read_bytes()
    assert parsed.text == [str(path) for path in paths[notebook.MAX_FIGURES :]]
    assert notebook.embed_figures([Path("lost.png")]) == ""
