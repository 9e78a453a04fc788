"""Damage, made from a seed alone: to bytes, to the structure of a TIFF, to JSON and TOML."""

from __future__ import annotations

import copy
import json
import struct

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF,
           0x80000000, 0xFFFFFFFF)  # fmt: skip
TAGS = (254, 256, 257, 258, 259, 262, 266, 270, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324,
        325, 330, 338, 339, 347)  # fmt: skip
SCALARS = (None, True, False, 0, 1, -1, 2, 3, 255, 256, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 70,
           0.5, -0.0, 1e308, 1e-300, float("nan"), float("inf"), "", "0", "x", "..", "../..", "/",
           "a/b", "c", "uint8", "float64", "|V9", "\0", "ä" * 40, "y" * 5000, [], {}, [[]],
           [0], {"": 0}, [1] * 300, "int8", "int16", "uint16", "<u2", ">u2", "|u1", "|i1", "big",
           "little", "default", "v2", ".", 24, 64, 320, 520, "c,y,x", "float32")  # fmt: skip


def damage_bytes(data, rng, *, within=None, most=4):
    """Change some bytes; ``within`` are (offset, length) spans outside which nothing changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not out:
            return bytes(out)
        if within is not None:
            offset, length = rng.choice(within)
            _one_place(out, rng, offset, min(length, len(out) - offset))
            continue
        what = rng.random()
        if what < 0.7:
            _one_place(out, rng, 0, len(out))
        elif what < 0.8:
            del out[rng.randrange(len(out)) :]
        elif what < 0.9:
            start = rng.randrange(len(out))
            del out[start : start + rng.choice((1, 2, 4, 12, 100))]
        else:
            start = rng.randrange(len(out))
            piece = out[start : start + rng.choice((1, 4, 12, 100))]
            place = rng.randrange(len(out) + 1)
            out[place:place] = piece
    return bytes(out)


def _one_place(out, rng, offset, length):
    if length < 1:
        return
    place = offset + rng.randrange(length)
    what = rng.randrange(4)
    if what == 0:
        out[place] ^= 1 << rng.randrange(8)
    elif what == 1:
        out[place] = rng.randrange(256)
    elif what == 2:
        end = min(place + rng.choice((2, 4, 16)), offset + length)
        out[place:end] = bytes(end - place)
    else:
        size = rng.choice((2, 4))
        if place + size <= offset + length:
            number = rng.choice(NUMBERS) & ((1 << (8 * size)) - 1)
            out[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))


def tiff_entries(data):
    """(byte order, big, [offset of each directory entry]) as far as they can be followed."""
    if len(data) < 16 or data[:2] not in (b"II", b"MM"):
        return "<", False, []
    order = "<" if data[:2] == b"II" else ">"
    version = struct.unpack_from(order + "H", data, 2)[0]
    big = version == 43
    word, head, size = ("Q", 8, 20) if big else ("I", 2, 12)
    place = struct.unpack_from(order + word, data, 8 if big else 4)[0]
    entries = []
    for _ in range(8):
        if not 0 < place <= len(data) - head:
            break
        count = struct.unpack_from(order + ("Q" if big else "H"), data, place)[0]
        if count > 200:
            break
        entries += [place + head + k * size for k in range(count)]
        after = place + head + count * size
        if after + struct.calcsize(word) > len(data):
            break
        place = struct.unpack_from(order + word, data, after)[0]
    return order, big, [entry for entry in entries if entry + size <= len(data)]


def damage_tiff(data, rng):
    """Change tags, types, counts and values of directory entries."""
    order, big, entries = tiff_entries(data)
    if not entries:
        return damage_bytes(data, rng)
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        entry = rng.choice(entries)
        what = rng.random()
        if what < 0.1:
            struct.pack_into(order + "H", out, entry, rng.choice(TAGS))
        elif what < 0.2:
            struct.pack_into(
                order + "H", out, entry + 2, rng.choice((0, 1, 2, 3, 4, 5, 12, 16, 99))
            )
        elif what < 0.35:
            number = rng.choice((*NUMBERS, rng.randrange(64)))
            struct.pack_into(order + ("Q" if big else "I"), out, entry + 4, number)
        else:
            place, width = (entry + 12, 8) if big else (entry + 8, 4)
            size = rng.choice((2, 4, width))
            number = rng.choice((*NUMBERS, rng.randrange(64), rng.randrange(1 << 16)))
            number &= (1 << (8 * size)) - 1
            out[place : place + size] = number.to_bytes(size, "little" if order == "<" else "big")
    return bytes(out)


def damage_json(value, rng):
    """A copy of plain JSON with one to three places changed, removed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return rng.choice(SCALARS)
        holder, key = rng.choice(places)
        what = rng.random()
        if what < 0.5:
            holder[key] = copy.deepcopy(rng.choice(SCALARS))
        elif what < 0.65:
            del holder[key]
        elif what < 0.8:
            other, place = rng.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice(
                (holder[key] + 1, holder[key] * 2, -holder[key], holder[key] - 1)
            )
        else:
            holder[rng.choice(("", "x", "version", "format", key + "s"))] = holder[key]
    return value


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)


def damage_document(raw, rng):
    """Damaged bytes of a JSON file: by its structure mostly, else by its bytes."""
    if rng.random() < 0.7:
        try:
            return json.dumps(damage_json(json.loads(raw), rng)).encode()
        except (ValueError, RecursionError):
            pass
    if rng.random() < 0.05:
        return b"[" * rng.choice((10, 1000, 200_000))
    return damage_bytes(raw, rng)


def damage_text(text, rng):
    """Damaged text: lines moved, values replaced, characters changed."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        what = rng.random()
        place = rng.randrange(len(lines)) if lines else 0
        if not lines or what < 0.1:
            lines.insert(
                place, rng.choice(("[x]", "a = ", "= 3", '"""', "[[b]]", "x = {", "\0", "é"))
            )
        elif what < 0.6 and "=" in lines[place]:
            key = lines[place].split("=")[0]
            value = rng.choice(SCALARS)
            shown = json.dumps(value) if value is not None else "nan"
            lines[place] = f"{key}= {shown}"
        elif what < 0.7:
            del lines[place]
        elif what < 0.8:
            lines.append(lines[place])
        else:
            lines[place] = damage_bytes(lines[place].encode(), rng).decode("latin-1")
    return "\n".join(lines) + "\n"
