"""The compiled engine: a fused program, with the partial step of the reductions that end it, as one LLVM function.

target      what this machine offers: CPU, vector math     folds     what each reduction is, lane by lane
lanes       values in vector registers, casts              module    structure -> LLVM assembly
lower       what each operation is in LLVM                 objects   object code: compiled once, kept on disk, loaded
nest        which loops go over a tile                     engine    plain kernel -> structure -> compiled kernel
structure   what the code depends on; its arguments        kernel    a compiled kernel bound to memory, as workers run it
"""
