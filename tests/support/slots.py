"""The names of a plan's slots where products that it joins have the names that they have apart."""

from ownpath.plan.plan import Plan


def slots_apart(plan: Plan) -> list[str]:
    parts = {op.spec.slot: [part.slot for part in op.spec.parts] for op in plan.ops}
    return [name for slot in plan.slots for name in parts.get(slot) or [slot]]
