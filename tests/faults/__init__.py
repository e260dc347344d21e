"""The whole system under faults, and a checker that says what its readers were not given, or should not have been.

app       what is declared
schedule  which faults, when: by a seed
proxy     between one service and its Redis: cuts, holds, slows, and swallows answers
system    the processes, and what can be done to them
load      users who write and read, and log it
check     the logs beside the store's own history. Pure
run       all of it: `make faults MINUTES=10`
"""
