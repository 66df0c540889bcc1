"""One self-contained HTML file about pruned models: figures, tables, pictures, each with its conditions."""
