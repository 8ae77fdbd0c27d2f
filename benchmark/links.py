"""Line numbers of the links from docs/*.md into the code, as [`quoted code`](../file.py#L1): python benchmark/links.py writes them anew."""
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def relinked(text: str) -> str:
    """The page with every link at the first line that holds what it quotes. Raises ValueError where no line does."""

    def line_of(match: re.Match) -> str:
        quote, file = match[1], match[2]
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if quote in line:
                return f"[`{quote}`](../{file}#L{number})"
        raise ValueError(f"no line of {file} holds {quote!r}")

    return re.sub(r"\[`([^`\n]+)`\]\(\.\./([a-z_]+\.(?:py|sh))#L\d+\)", line_of, text)


if __name__ == "__main__":
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(relinked(page.read_text()))
