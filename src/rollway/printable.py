"""Text that is safe at a terminal: a policy writes what it likes, and much of it is quoted in tables and messages."""


def printable(text: str) -> str:
    """`text` with control and other invisible characters escaped, so that model output cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """`printable` line by line; tabs stay."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
