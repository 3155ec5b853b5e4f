"""What the machine code of the kernel for Hopper must be like."""

import re

from sass import Program

from cuattn import jit
from cuattn.config import ForwardSm90Config

#: Exponentials without which the maxima of both rows are not there.
EARLY = 2


def wrong_with(config: ForwardSm90Config) -> list[str]:
    """What is wrong with a kernel's code; nothing for a good one."""
    resources, program = jit.resources(config), Program.of(jit.cubin_path(config))
    errors = []
    if resources.spills:
        errors.append(f"spills: {resources}")
    if resources.serialized:
        errors.append("products are serialized")
    errors += [] if program.find(r"^HGMMA\b") else ["no HGMMA"]
    # keys in one piece come by the copy engine, unless there are no registers for both ways
    boxes = not config.paged or config.consumers < 3
    if bool(program.find(r"^UTMALDG\b")) != boxes:
        errors.append("no UTMALDG" if boxes else "the copy engine fetches keys that it cannot find")
    plan = {"DEALLOC": config.producer_registers, "ALLOC": config.consumer_registers}
    for kind, allowed in plan.items() if config.consumers > 1 else ():  # else a thread has all that it can have
        (start,) = program.find(rf"^USETMAXREG\.(TRY_)?{kind}")
        number = int(re.findall(r"0x[0-9a-f]+", program.instructions[start].text)[-1], 16)
        if number != allowed:
            errors.append(f"{kind}: got {number} registers, expected {allowed}")
        if (used := program.registers(start)) > allowed:
            errors.append(f"{kind}: {used} registers are used of {allowed}")
    # a step's maxima and first exponentials come between the waits for scores and for outputs, beside the products
    scores, outputs = program.find(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x1"), program.find(r"^WARPGROUP\.DEPBAR")
    if len(scores) != 1:
        return [*errors, f"got {len(scores)} waits that leave a group under way, expected 1"]
    (first,), end = scores, next(i for i in outputs if i > scores[0])
    beside = sum(first < i < end for i in program.find(r"^MUFU\.EX2"))
    if beside < EARLY:
        errors.append(f"{beside} exponentials run beside the products, expected {EARLY}")
    return errors
