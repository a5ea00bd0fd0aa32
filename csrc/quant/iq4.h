/* The sixteen levels of IQ4_NL and IQ4_XS, a constant of the format. */
#ifndef KL_IQ4_H
#define KL_IQ4_H

#include "quant.h"

static const int8_t kl_iq4_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113 };

#endif
