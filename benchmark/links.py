"""Line numbers of the links from docs/*.md into the code: python benchmark/links.py updates them.

A link quotes a line of code, as [`quoted code`](../world/tasks.py#L1).
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The quote, and the file: in the root or in one folder, world/ or plumbing/ for example.
LINK = re.compile(r"\[`([^`\n]+)`\]\(\.\./((?:[a-z_]+/)?[a-z_0-9]+\.(?:py|sh))#L\d+\)")


def line_of(quote: str, file: str) -> int:
    """The number of the first line of a file that holds the quote. Raises ValueError if none."""
    for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
        if quote in line:
            return number
    raise ValueError(f"no line of {file} holds {quote!r}")


def relinked(text: str) -> str:
    """The page with every link at the first line that holds what it quotes.

    Raises ValueError where no line does.
    """

    def update(match: re.Match) -> str:
        quote, file = match.groups()
        return f"[`{quote}`](../{file}#L{line_of(quote, file)})"

    return LINK.sub(update, text)


if __name__ == "__main__":
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(relinked(page.read_text()))
