#!/usr/bin/env python3
"""Holds the #include lines of src/ against the room table in src/CMakeLists.txt.

A room may include headers of its own folder and of the rooms in its LINKS; its tests also those in TEST_LINKS. Every
folder with sources must be a registered room, and headers of other rooms are named from src/: "room/file.h".
"""
import pathlib
import re
import sys

KEYWORDS = ("LINKS", "LIBS", "TEST_LINKS", "TEST_LIBS")
SRC = pathlib.Path(__file__).resolve().parent.parent / "src"


def read_rooms():
    """{room: {keyword: set of words}} in the order of the table, bottom to top."""
    rooms = {}
    text = re.sub(r"#.*", "", (SRC / "CMakeLists.txt").read_text())
    for call in re.findall(r"jointkv_room\(([^)]*)\)", text):
        name, *words = call.split()
        rooms[name] = {keyword: set() for keyword in KEYWORDS}
        keyword = None
        for word in words:
            if word in KEYWORDS:
                keyword = word
            else:
                rooms[name][keyword].add(word)
    return rooms


def main():
    rooms = read_rooms()
    errors = []
    below = set()
    for room, table in rooms.items():
        errors += [f"src/CMakeLists.txt: {room} links {other}, which is not below it" for other in table["LINKS"] - below]
        below.add(room)

    files = sorted(path for pattern in ("*.cc", "*.h") for path in SRC.rglob(pattern))
    for path in files:
        name = path.relative_to(SRC)
        if len(name.parts) == 1:
            continue  # main.cc, which CMake links to the top room
        room = name.parts[0]
        if len(name.parts) != 2 or room not in rooms:
            errors.append(f"src/{name}: not in a folder that src/CMakeLists.txt registers with jointkv_room")
            continue
        allowed = {room} | rooms[room]["LINKS"]
        if name.stem.endswith("_test"):
            allowed |= rooms[room]["TEST_LINKS"]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
            if not include:
                continue
            where, target = f'src/{name}:{number}: "{include[1]}"', include[1].split("/")[0]
            if target in rooms and target not in allowed:
                errors.append(f"{where}: {room} may not include {target}")
            elif target not in rooms and (path.parent / include[1]).exists():
                errors.append(f'{where}: name it from src/, as "{room}/..."')

    print("\n".join(errors) if errors else f"includes: {len(files)} files in {len(rooms)} rooms keep to the table")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
