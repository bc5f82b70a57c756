"""How fastdpo's native libraries are compiled, and the wheel is made of them: read by setup.py and the Makefile."""
