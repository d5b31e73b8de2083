"""A KappaReport and a budget in, a Selection with the reason for each matrix out.

`report` holds what a scan measured, `ranking` the criteria, `budget` the ways to write K, `selection` the choice;
`table` and `plot` show it.
"""
