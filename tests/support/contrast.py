"""Contrast of the texts of a page, as WCAG 2 counts it."""

import re

TEXTS = """(() => {
    document.querySelectorAll("details").forEach(found => { found.open = true; });
    const pairs = {}, seen = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.data.trim(), chain = [];
        for (let at = walker.currentNode.parentElement; at; at = at.parentElement) chain.push(at);
        const kind = chain.map(at => at.tagName + at.className).join();
        if (!text || seen.has(kind)) continue;
        seen.add(kind);
        const behind = chain.map(at => getComputedStyle(at).backgroundColor).find(c => c !== "rgba(0, 0, 0, 0)");
        pairs[getComputedStyle(chain[0]).color + "|" + behind] = text;
    }
    return pairs;
})()"""
"""Opens everything; text colour and the colour behind it -> one of the texts that have them."""


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of ``rgb(r, g, b)``."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    """WCAG 2's contrast of two luminances."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
