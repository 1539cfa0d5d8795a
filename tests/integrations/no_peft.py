"""A plugin for pytest (`-p tests.integrations.no_peft`): peft cannot be imported, and looks as if it were not installed."""

import sys

sys.modules["peft"] = None  # type: ignore[assignment]
