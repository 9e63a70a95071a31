"""Run the scripts in algorithms/, collect results, build tables and figures: python -m benchmark --help"""
