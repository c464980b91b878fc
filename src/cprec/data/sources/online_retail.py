"""Online Retail and Online Retail II (UCI): the lines of a shop's invoices, as CSV; one product of an invoice a line.

The archive's own CSV is `data.csv`; its sheet (`Online Retail.xlsx`) is read once it is saved as CSV.

A line is set aside with its reason where it has no customer, belongs to a cancelled invoice, has a quantity of zero or
less, or is not of a product (postage, fees, manual corrections: their stock codes do not begin with five digits). Times
are the shop's local ones, read as UTC. The events name their product themselves.
"""

from __future__ import annotations

import codecs
from dataclasses import replace
from pathlib import Path
from typing import Any

import ibis

from cprec.data.engine import TableEngine
from cprec.data.sources.raw import RawTable
from cprec.data.sources.readers import Format, Read, delimited
from cprec.data.text_files import first_line

FIRST = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country")
SECOND = ("Invoice", "StockCode", "Description", "Quantity", "InvoiceDate", "Price", "Customer ID", "Country")

CANCELLED = "cancelled invoice"
NOTHING_SOLD = "quantity is not above zero"
NO_PRODUCT = "no product: postage, a fee or a correction"


def iso_time(text: Any) -> Any:
    """ "12/1/2010 8:26" (month first) as "2010-12-01T08:26:00"; what is shaped otherwise stays as it is."""
    shape = r"^(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d{2})(:\d{2})?$"
    part = [text.re_extract(shape, group) for group in range(6)]
    moment = (
        part[3] + "-" + part[1].lpad(2, "0") + "-" + part[2].lpad(2, "0") + "T" + part[4].lpad(2, "0") + ":" + part[5]
        + ":00"
    )  # fmt: skip
    return ibis.ifelse(text.re_search(shape), moment, text)


def _judged(lines: Any) -> Any:
    customer = lines["customer"].re_replace(r"\.0$", "")
    quantity = lines["quantity"].try_cast("float64")
    problem = ibis.cases(
        (lines["invoice"].upper().startswith("C"), CANCELLED),
        (~lines["item_id"].re_search(r"^\d{5}"), NO_PRODUCT),
        (quantity.isnull() | (quantity <= 0), NOTHING_SOLD),
        else_=ibis.null("string"),
    )
    return lines.mutate(customer=customer, problem=problem, timestamp=iso_time(lines["timestamp"]))


def _read(engine: TableEngine, what: str, files: tuple[Path, ...]) -> RawTable:
    second = "Customer ID" in first_line(files[0])
    read: Read = delimited(*(SECOND if second else FIRST), header=True, encoding=_encoding(files[0]))
    raw = read(engine, what, files)
    names = dict(
        zip(
            ("invoice", "item_id", "title", "quantity", "timestamp", "price", "customer", "country"),
            raw.columns,
            strict=True,
        )
    )
    table = _judged(raw.table.rename({new: old for new, old in names.items() if new != old}))
    return replace(raw, table=table, columns=("customer", "item_id", "timestamp", "title", "price", "problem"))


def _encoding(path: Path) -> str:
    """utf-8 if the file is, else latin-1, which most copies are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


FORMATS = {"online-retail": Format(interactions=_read, timestamps="iso", columns={"user_id": "customer"})}
