"""From what people wrote to checked training rows."""
