"""What reports are made of, whatever they report: tables in text, records in JSON; and the page that compares runs."""
