"""For mkdocs: a link out of docs/, which a reader of the repository follows to a file, names that file on the site."""

import re

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    return _OUTSIDE.sub(_named, markdown)


def _named(link: re.Match[str]) -> str:
    text, file = link.groups()
    return f"`{file}` in the repository" if text.strip("`") == file else f"{text} (`{file}` in the repository)"
