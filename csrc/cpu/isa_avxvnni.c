/* Integer products, compiled for AVX2 with AVX-VNNI; every other kernel of that table is isa_avx2.c's. */
#define AVXVNNI(name) kl_avxvnni_##name
#include "avxvnni.inc"
