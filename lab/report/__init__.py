"""From numbers to sentences, records, tables, figures, a summary and a paper's values."""
