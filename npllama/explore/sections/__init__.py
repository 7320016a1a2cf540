"""The twelve sections of the page, one module each; `section(run)` makes a Section of a Record."""
