"""Pages as a pipe gets them: whole lines, no colours."""

from collections.abc import Sequence

from ownpath.bench.row import Row
from ownpath.bench.table import table_page
from ownpath.inspect.inspection import Inspection
from ownpath.inspect.report import inspection_page
from ownpath.plan.plan import Plan
from ownpath.plan.show import plan_page
from ownpath.selftest.run import SelfTestReport, report_page
from ownpath.terminal.console import plain_text
from ownpath.verify import report
from ownpath.verify.run import Verification


def plan_text(plan: Plan) -> str:
    return plain_text(*plan_page(plan))


def inspection_text(inspection: Inspection) -> str:
    return plain_text(*inspection_page(inspection))


def verification_text(result: Verification) -> str:
    return plain_text(*report.report_page(result))


def self_test_text(result: SelfTestReport) -> str:
    return plain_text(*report_page(result))


def table_text(rows: Sequence[Row], title: str) -> str:
    return plain_text(*table_page(rows, title))
