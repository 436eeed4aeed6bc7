"""Known and chosen quantities of an estimate."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from flexcache.validation import Options


class ForecastTerms(Options):
    """Given quantities of an estimate, in addition to the configuration of the capture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample: int = Field(2048, ge=1, description="documents to tokenize; the rest of the corpus is extrapolated")
    seconds: float = Field(10.0, gt=0, description="seconds for which the model is tried, after it is loaded")
    tokens_per_second: float | None = Field(
        None, gt=0, description="tokens a second of one process, padding included; then the model is not loaded"
    )
    write_rate: float | None = Field(
        None, gt=0, description="megabytes a second that the disk writes; measured by default"
    )
    processes: int = Field(1, ge=1, description="processes that will capture at the same time")
    price_hour: float | None = Field(None, ge=0, description="price of one process for an hour")
    price_tb_month: float | None = Field(None, ge=0, description="price of storing a terabyte for a month")
    seed: int = Field(0, ge=0, description="seed of the sample")
