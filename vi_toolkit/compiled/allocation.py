"""Moves the allocations of a compiled loop out of the loop.

Inductor's C++ allocates every intermediate tensor of a loop's body in each iteration, and makes a
new handle for every input. For a small model these are about fifty allocations, which take longer
than the arithmetic. All of these tensors have fixed shapes and are dead at the end of the
iteration, so they can be allocated once, before the loop. The new state is written to where the
state before the last one was: the two swap places after each iteration. So the machine code
overwrites its inputs.
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
    """Rewrite C++ that has one ``while`` loop so that its body allocates nothing.

    The new state swaps places with the old one. Any other tensor that may be needed after the
    iteration is still allocated in it: tensors that are moved out, tensors that these are views of
    or share memory with, and all arguments of a call that made one.

    Args:
        source: C++ that inductor wrote.

    Returns:
        The rewritten C++, or ``source`` itself if it has another form.

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
    if any(line.endswith("{") for line in lines):  # an inner loop or branch
        return source
    swapped = _new_states(before, lines)
    untouched = _leaving(lines) - swapped.keys()
    once: list[str] = []  # lines before the loop
    each: list[str] = []  # lines in it
    outside: set[str] = set()  # tensors that are now allocated before the loop
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
        elif name is None or name in untouched:
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
    # A line of another form may still take one of these tensors from later iterations.
    given_up = {n for line in each for n in _GIVEN_UP.findall(line) + _MOVED.findall(line)}
    if given_up & (outside | inputs):
        return source
    return before + "\n".join([*once, _BEGIN + "\n".join(each)]) + _END + after


def _new_state(lines: list[str]) -> str:
    """The name that the first two of ``lines`` move into the state; empty if they do not."""
    match = _STATE.match("\n".join(lines[:2]))
    return match[2] if match else ""


def _new_states(before: str, lines: list[str]) -> dict[str, str]:
    """New state -> old state, if the new one is allocated in the loop and only moved to the old."""
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
    """Names of tensors that are, or whose memory is, perhaps needed after the iteration."""
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
