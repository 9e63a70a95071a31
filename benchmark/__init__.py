"""Run the scripts in algorithms/, keep their results, make tables and pictures of them: python -m benchmark --help"""
