"""Turn documents or requests into a plan, and estimate what it costs."""
