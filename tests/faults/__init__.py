"""The whole system under faults, and a checker that says what its readers were not given, or should not have been.

app       what is declared; `app_next` is its second version
schedule  which faults, when: by a seed
proxy     between one service and its Redis: cuts, holds, slows, and swallows answers
system    the processes, and what can be done to them
pace      what is written, how often, by how many. Plain values
load      all users: `writers`, `readers`, and the `expensive` client
watch     probes of each partition, the table `connections`, memory
logs      what all of them note. Plain values
history   the store's change streams, read while they are written
expect    what each reader should be told of that history. Pure
check     the logs beside it. Pure
bounds    pauses, absences, late answers and memory beside their bounds. Pure
figures   what a run came to, as tables
breaks    lines of Tidewire that are changed, and what the checker must then find
run       all of it: `make faults MINUTES=10`
"""
