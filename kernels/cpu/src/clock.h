// Seconds by operation of a session that is timed.
#pragma once

#include "session.h"

// Adds the time until the end of its block to an operation's.
class pf_session::Clock {
  public:
    Clock(pf_session &session, pf::Operation operation) : session_(session), operation_(operation) {
        if (session.timed) begin_ = pf::now();
    }
    ~Clock() {
        if (session_.timed) session_.seconds[operation_] += pf::now() - begin_;
    }

  private:
    pf_session &session_;
    pf::Operation operation_;
    double begin_ = 0;
};
