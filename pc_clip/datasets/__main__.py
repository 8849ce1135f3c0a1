"""`python -m pc_clip.datasets`: the data sets, found or not."""

from pathlib import Path

from pc_clip.datasets import READERS


def main() -> None:
    """List the data sets: found or not, where they are looked for, what to fetch."""
    for name, reader in READERS.items():
        found = reader.root is None or Path(reader.root).is_dir()
        state, place = "found" if found else "not found", reader.root or "embedded"
        print(f"{name:10} {state:10} {place:15} {reader.size:8} {reader.licence}")
        if not found:
            print(f"{'':10} {reader.fetch}")


if __name__ == "__main__":
    main()
