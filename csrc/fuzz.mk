# make fuzz [FUZZ_INPUTS=N] [FUZZ_SECONDS=S]: csrc/kernels alone under AddressSanitizer and UndefinedBehaviorSanitizer, first
# N generated inputs, then S seconds of libFuzzer, on every instruction set that this machine runs.
FUZZ_INPUTS  ?= 1000000
FUZZ_SECONDS ?= 60
FUZZ_CXX     ?= clang++
FUZZ_FOLDER  := build/fuzz
FUZZ_FLAGS   := -std=c++20 -O1 -g -Icsrc -ffp-contract=off -fno-sanitize-recover=all -Wno-psabi

FUZZ_avx2        := -mavx2 -mfma -mf16c
FUZZ_avx512      := $(FUZZ_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
FUZZ_avx512_bf16 := $(FUZZ_avx512) -mavx512bf16
FUZZ_amx         := $(FUZZ_avx512_bf16) -mamx-tile -mamx-bf16
FUZZ_SETS        := baseline $(if $(filter x86_64,$(shell uname -m)),avx2 avx512 avx512_bf16 amx)

.PHONY: fuzz
fuzz: $(FUZZ_FOLDER)/driver $(FUZZ_FOLDER)/fuzzer
	$< $(FUZZ_INPUTS)
	mkdir -p $(FUZZ_FOLDER)/corpus
	$(FUZZ_FOLDER)/fuzzer -max_total_time=$(FUZZ_SECONDS) -max_len=160 -print_final_stats=1 $(FUZZ_FOLDER)/corpus

$(FUZZ_FOLDER)/driver: FUZZ_SANITIZERS := address,undefined
$(FUZZ_FOLDER)/driver: FUZZ_MAIN := -DE3_FUZZ_DRIVER
$(FUZZ_FOLDER)/fuzzer: FUZZ_SANITIZERS := address,undefined,fuzzer

$(FUZZ_FOLDER)/driver $(FUZZ_FOLDER)/fuzzer: csrc/fuzz/kernels.cpp $(wildcard csrc/kernels/* csrc/kernels/*/* csrc/simd/*)
	mkdir -p $(FUZZ_FOLDER)
	$(foreach isa,$(FUZZ_SETS),$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=$(FUZZ_SANITIZERS) $(FUZZ_$(isa)) \
	  -DE3_ISA_NAMESPACE=$(isa) -c csrc/kernels/ops_table.cpp -o $@.$(isa).o &&) \
	$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=$(FUZZ_SANITIZERS) $(FUZZ_MAIN) $< $(FUZZ_SETS:%=$@.%.o) -o $@
