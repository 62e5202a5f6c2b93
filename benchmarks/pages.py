"""Tables in Markdown, and pages that hold them between two marks."""

from __future__ import annotations

END = "<!-- end -->"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """In Markdown, all columns but the first to the right."""
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str, begin: str, text: str) -> str:
    """The page with `text` between the mark `begin` and the END that follows it."""
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
