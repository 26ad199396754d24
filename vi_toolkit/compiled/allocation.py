"""The memory of a compiled loop, allocated once instead of at every step.

Inductor's C++ allocates each intermediate tensor of a loop's body anew in each iteration and makes
a new handle of every input: for a small model about fifty allocations, which take longer than its
arithmetic. All of these tensors have fixed shapes and are dead when the iteration ends, so they
may as well be allocated before the loop. The new state is written where the state before the last
one was: the two change places after each iteration. So the program writes into its inputs.
"""

from __future__ import annotations

import re

_BEGIN, _END = "    while (1) {\n", "\n    }\n"
_HANDLE = re.compile(r"\s*AtenTensorHandle (\w+)_handle;$")
_VIEW = re.compile(
    r"(\s*auto (\w+) = wrap_with_raii_handle_if_needed\(reinterpret_tensor_wrapper\((\w+),[^;]*;)"
    r"(?: \3\.reset\(\);)?  // (?:alias|reuse)$"
)
_REUSE = re.compile(r"\s*auto (\w+) = std::move\((\w+)\);  // reuse$")
_INPUT = re.compile(r".*aoti_torch_assign_tensors_out\((\w+), &")
_MOVED = re.compile(r"std::move\((\w+)\)")
_GIVEN_UP = re.compile(r"\b(\w+)\.(?:reset|release)\(")
_STATE = re.compile(r"\s*(\w+)\.reset\(\);\n\s*\1 = std::move\((\w+)\);$")
_WORD = re.compile(r"\w+")


def allocate_once(source: str) -> str:
    """C++ of a program with one ``while`` loop, with the allocations of its body before it.

    The new state takes the place of the old one, whose memory it has in the next iteration. Any
    other name that may be part of what leaves an iteration stays as it is: the names that are
    moved out, those they are views of or reuse the memory of, and all arguments of a call that
    made one. A program of any other form is returned unchanged.

    Example:
        >>> print(allocate_once('''
        ...     while (1) {
        ...         AtenTensorHandle a_handle;
        ...         CHECK(aoti_torch_empty_strided(1, size, stride, &a_handle));
        ...         RAIIAtenTensorHandle a(a_handle);
        ...         kernel(a.data_ptr(), state.data_ptr());
        ...         a.reset();
        ...     }
        ... '''))
        <BLANKLINE>
                AtenTensorHandle a_handle;
                CHECK(aoti_torch_empty_strided(1, size, stride, &a_handle));
                RAIIAtenTensorHandle a(a_handle);
            while (1) {
                kernel(a.data_ptr(), state.data_ptr());
            }
        <BLANKLINE>
    """
    if source.count(_BEGIN) != 1:
        return source
    before, rest = source.split(_BEGIN)
    if _END not in rest:
        return source
    body, after = rest.split(_END, 1)
    lines = body.split("\n")
    if any(line.endswith("{") for line in lines):  # a loop or a branch within
        return source
    swapped = _new_states(before, lines)
    kept_as_they_are = _leaving(lines) - swapped.keys()
    once: list[str] = []
    each: list[str] = []
    outside: set[str] = set()  # tensors that now live outside of the loop
    inputs: set[str] = set()  # other names for the loop's state
    position = 0
    while position < len(lines):
        line = lines[position]
        three = lines[position : position + 3]
        handle, view, reuse = _HANDLE.match(line), _VIEW.match(line), _REUSE.match(line)
        name = handle[1] if handle else view[2] if view else reuse[1] if reuse else None
        if line.lstrip().startswith("static constexpr"):
            once.append(line)
        elif (new := _new_state(three)) in swapped:
            each.append(f"        std::swap({swapped[new]}, {new});")
            position += 1
        elif name is None or name in kept_as_they_are:
            if line.strip().removesuffix(".reset();") not in outside | inputs:
                each.append(line)
        elif handle and "aoti_torch_empty_strided(" in three[1]:
            once += three
            outside.add(name)
            position += 2
        elif handle and (source_of := _INPUT.match(three[1])):
            each.append(f"        auto& {name} = {source_of[1]};")
            inputs.add(name)
            position += 2
        elif view and view[3] in outside | inputs:
            (once if view[3] in outside else each).append(view[1])
            (outside if view[3] in outside else inputs).add(name)
        elif reuse and reuse[2] in outside | inputs:
            there = outside if reuse[2] in outside else inputs
            (once if there is outside else each).append(f"        auto& {name} = {reuse[2]};")
            there.add(name)
        else:
            each.append(line)
        position += 1
    # Whatever else would take one of these tensors from the iterations that follow.
    given_up = {n for line in each for n in _GIVEN_UP.findall(line) + _MOVED.findall(line)}
    if given_up & (outside | inputs):
        return source
    return before + "\n".join([*once, _BEGIN + "\n".join(each)]) + _END + after


def _new_state(lines: list[str]) -> str:
    """The name moved into the state by the first two of ``lines``; empty if none is."""
    match = _STATE.match("\n".join(lines[:2]))
    return match[2] if match else ""


def _new_states(before: str, lines: list[str]) -> dict[str, str]:
    """New state -> state, where the new one is allocated in the loop and only moved to the old."""
    found = {}
    for position in range(len(lines)):
        match = _STATE.match("\n".join(lines[position : position + 2]))
        if not match:
            continue
        state, new = match[1], match[2]
        made = [k for k, one in enumerate(lines) if f"&{new}_handle" in one]
        related = [m for m in map(_REUSE.match, lines) if m and new in (m[1], m[2])]
        moves = [one for one in lines if new in _MOVED.findall(one)]
        if len(made) == len(moves) == 1 and "aoti_torch_empty_strided(" in lines[made[0]]:
            there = f"RAIIAtenTensorHandle {state}({state}_handle);" in before
            if there and not related:
                found[new] = state
    return found


def _leaving(lines: list[str]) -> set[str]:
    """Names whose tensor, or the memory of it, may be needed after the iteration."""
    found: set[str] = set()
    reuses = [m for m in map(_REUSE.match, lines) if m]
    views = [m for m in map(_VIEW.match, lines) if m]
    for line in lines:
        if not _REUSE.match(line):
            found.update(_MOVED.findall(line))
    size = -1
    while len(found) > size:
        size = len(found)
        for one in reuses:
            if found & {one[1], one[2]}:
                found |= {one[1], one[2]}
        found |= {view[3] for view in views if view[2] in found}
        for line in lines:
            made = [n for n in found if f"&{n}_handle" in line]
            if made and "aoti_torch_empty_strided(" not in line and not _INPUT.match(line):
                found.update(_WORD.findall(line))
    return found
