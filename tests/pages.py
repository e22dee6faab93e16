"""The structure of a page, as a parser sees it."""

from html.parser import HTMLParser

EMPTY_ELEMENTS = {"meta", "link", "br", "img"}


class Structure(HTMLParser):
    """Fails where tags do not close what they opened; keeps plots, headings, links and text."""

    def __init__(self):
        super().__init__()
        self.open, self.plots, self.headings = [], 0, []
        self.addresses, self.anchors, self.ids, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.plots += attributes.get("class") == "plot"
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("href", "src", "action", "srcset", "data", "poster"):
            value = attributes.get(name)
            if value is not None and value.startswith("#"):
                self.anchors.append(value[1:])
            elif value is not None:
                self.addresses.append(value)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in {"p", "li"}:  # HTML closes these by itself
            while self.open and self.open[-1] in {"p", "li"}:
                self.open.pop()
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        if "script" not in self.open and "style" not in self.open:
            self.text += data


def structure(text):
    """The structure of a page, which stands on its own: it has no address of anything else, and
    what it links to is in it."""
    found = Structure()
    found.feed(text)
    assert found.open == []
    assert set(found.addresses) <= {"data:,"}
    assert set(found.anchors) <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    return found
