/* Devices by name (device.c). */
#ifndef KL_DEVICE_H
#define KL_DEVICE_H

#include "internal.h"

/* Makes the context one of the device's: "cpu" or NULL, "hip-host", "hip" (the first GPU), "hip:N". */
kl_status kl_device_choose(kl_ctx *ctx, const char *name) KL_CHECKED;

#endif
