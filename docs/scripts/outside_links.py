"""For mkdocs: a link out of docs/, which a reader of the repository follows to a file, names that file on the site."""

import re

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    return _OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
