"""Writes a C project that takes much memory to compile and little time: records, functions that work on them, and a main
program that calls them all. The same each time."""

import pathlib
import random
import sys

UNITS, FUNCTIONS, STATEMENTS = 6, 300, 12

MAKEFILE = """CFLAGS = -O0 -g
units = $(patsubst %.c,%.o,$(wildcard *.c))

program: $(units)
\t$(CC) -o $@ $(units)
"""


def statement(draw):
    number = draw.randrange(1, 1000)
    return draw.choice(
        [
            f"\tr->count[{number % 2}] += x * {number} + (long)r->weight;\n",
            f"\tif (x % {number} == {number // 2}) {{ r->id ^= {number}; x += r->count[0]; }}\n",
            f"\tfor (int i = 0; i < {number % 7 + 1}; i++) x = (x << 1) ^ r->count[1] ^ i;\n",
            f"\tr->weight = r->weight * {number}.5 + x;\n",
            f"\tif (r->name && strlen(r->name) > {number % 30}) x -= r->name[{number % 3}];\n",
        ]
    )


def unit(name, draw):
    yield "#include <string.h>\n"
    for n in range(FUNCTIONS):
        record = f"struct record_{name}_{n}"
        yield f"{record} {{ int id; long count[{draw.randrange(2, 9)}]; const char *name; double weight; {record} *next; }};\n"
        yield f"static long step_{name}_{n}({record} *r, long x)\n{{\n"
        yield from (statement(draw) for _ in range(STATEMENTS))
        yield "\treturn x;\n}\n"
    yield f"long unit_{name}(long x)\n{{\n"
    for n in range(FUNCTIONS):
        yield f'\t{{ struct record_{name}_{n} r = {{ .id = {n}, .name = "record {name} {n}" }}; x = step_{name}_{n}(&r, x); }}\n'
    yield "\treturn x;\n}\n"


def main(directory):
    directory.mkdir(parents=True)
    (directory / "Makefile").write_text(MAKEFILE)
    for name in range(UNITS):
        (directory / f"unit{name}.c").write_text("".join(unit(name, random.Random(name))))
    calls = "".join(f"\tx = unit_{name}(x);\n" for name in range(UNITS))
    declared = "".join(f"long unit_{name}(long);\n" for name in range(UNITS))
    text = f"#include <stdio.h>\n{declared}int main(void)\n{{\n\tlong x = 1;\n{calls}\tprintf(\"%ld\\n\", x);\n\treturn 0;\n}}\n"
    (directory / "main.c").write_text(text)


main(pathlib.Path(sys.argv[1]))
