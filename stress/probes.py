"""What the rivals watch, beside what happens: --probes 0,1,2,5,... measures at those epochs.

On a fixed set of harmful probe prompts (the head of the harmful tests, with their answers) and benign ones (the head of
the task's tests), in fp32, with nothing of the training state touched: a run with probes is
bit-identical to one without.

    parameters   D_theta = ||theta_t - theta_0||;  D_W = (sum_l ||Delta W_l(t) - Delta W_l(0)||_F^2)^1/2,
                 without building Delta W: ||B A||_F^2 = sum (B^T B) o (A A^T)
    gradient     ||grad h|| of CE on harmful probe pairs; cos(grad h, -u), u: the last update;
                 harmful drop h(theta) - h(theta - 0.1 grad h / ||grad h||), which Booster watches
    drift        R = mean over tokens and layers of ||a_l(t) - a_l(0)||^2 / C on benign probes, a_l:
                 attention outputs; Vaccine's sum of squares and Booster's sum of norms
    bottleneck   S = mean_k ||h_t - h_0||^2 / C on the anchors and on held-out harmful probes
    first token  KL(p_0 || p_t) of the reply's first token; refusal margin: the largest logit of a
                 token that opens a refusal minus the largest of the others
"""
