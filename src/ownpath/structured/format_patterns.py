"""The values of ``format`` that are enforced, as regular expressions of their own where the library's are too wide.

None lets through what the format forbids. Some are narrower: times have no leap seconds, addresses no quoted names.
Source: RFC 3339 (appendix A, with section 5.7 on months), RFC 4291 (section 2.2).
"""

_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LEAP_YEAR = "(([0-9][0-9](0[48]|[2468][048]|[13579][26]))|(([02468][048]|[13579][26])00))"
_DAY = (
    "([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"({_BYTE}\.){{3}}{_BYTE}"
_GROUP = "[0-9A-Fa-f]{1,4}"


def _ipv6() -> str:
    """Eight groups, of which "::" leaves out one or more; the last two may be an IPv4 address."""
    last = f"({_GROUP}:{_GROUP}|{_IPV4})"
    forms = [f"({_GROUP}:){{6}}{last}"]
    for before in range(8):
        head = "" if before == 0 else f"{_GROUP}(:{_GROUP}){{{before - 1}}}"
        left = 7 - before
        tail = [f"({_GROUP}(:{_GROUP}){{0,{left - 1}}})?"] if left else [""]
        if left >= 2:
            tail.append(f"({_GROUP}:){{0,{left - 2}}}{_IPV4}")
        forms.append(f"{head}::({'|'.join(tail)})")
    return "(" + "|".join(forms) + ")"


FORMAT_PATTERNS = {
    "date": f"^{_DAY}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DAY}[Tt]{_TIME}$",
    "ipv4": f"^{_IPV4}$",
    "ipv6": f"^{_ipv6()}$",
}
"""Formats that are enforced by a pattern of ours."""
LIBRARY_FORMATS = ("duration", "email", "hostname", "uri", "uuid")
"""Formats that the library enforces."""
